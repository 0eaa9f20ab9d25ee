"""What a run trains: one file per system.

An objective is a settings class in ``settings``, chosen by ``objective=NAME``. It decides which
samples are drawn from a training set (:class:`storymem.training.objectives.samples.Samples`), and the loss of a network
on a batch of them (:class:`storymem.training.objectives.flow.FlowLoss`). The loop, experts, checkpoints, validation and
the log are the same for all of them.
"""
