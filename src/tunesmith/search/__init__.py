"""Which modules, how large and in which layers: searched for, and kept as a front of configurations."""
