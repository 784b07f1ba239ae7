"""Pure Flax Linen: partitioning, layers, encoders, generator, RagModel."""
