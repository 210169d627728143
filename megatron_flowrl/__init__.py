"""Megatron-FlowRL: train a language model to sample answers in proportion to their reward, at Megatron scale."""

__version__ = "0.1.0"
