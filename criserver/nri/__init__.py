"""The Node Resource Interface: plugins of the node that see and adjust pods and containers."""
