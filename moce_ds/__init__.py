"""moce_ds: masked autoencoders with a mixture of cluster-conditional experts, trained with DeepSpeed."""

__version__ = "0.1.0"
