"""The CRI streaming server's protocols: what travels over an upgraded HTTP connection."""
