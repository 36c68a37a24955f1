"""The demo and the road scenes that it draws."""
