"""Experiments with arithmetic: what training in 4 bits costs and loses, by the technique."""
