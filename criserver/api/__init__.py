"""The gRPC services of CRI. Each method calls one function of the rooms below."""
