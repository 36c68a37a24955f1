"""How fast, and in how much memory, against the published way of doing the same and against other libraries."""
