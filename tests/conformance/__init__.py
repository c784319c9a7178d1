"""The timer contract's broken promises, one scenario each, for any implementation of it.

A scenario is played by real processes: a server's process, its workers, and an observer
outside of both. It knows the implementation by its module's name, and uses nothing but the
names that this project and PyTorch have in common.
"""
