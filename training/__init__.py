"""Training of both stages, judging of engines, and import of the released checkpoints. Needs PyTorch."""

from dvq_rt.packages import refuse_strangers

refuse_strangers("training")
