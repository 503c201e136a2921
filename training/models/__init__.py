"""The networks: tokenizers of both families, their quantizer, the stacked transformer, the discriminator."""
