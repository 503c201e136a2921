"""What training reads: image folders, their pixels, streams of batches, and images as tokens."""
