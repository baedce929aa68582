"""The gRPC surface: the services of CRI, thin as paper, over the rooms below."""
