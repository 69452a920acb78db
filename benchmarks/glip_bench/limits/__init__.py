"""How fast it could be at best: the work in a graph, and what hardware can do."""
