"""The gRPC services of CRI. Each method calls one function of a lower room."""
