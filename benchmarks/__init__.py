"""How fast, and in how much memory, against the original implementation and other libraries."""
