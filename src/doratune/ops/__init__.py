"""Tensors in, tensors out: the mathematics of DoRA, without any nn.Module."""
