"""mHC, manifold-constrained hyper-connections: several residual streams, mixed by doubly stochastic matrices."""
