"""What only TensorRT needs: number formats in the graph, checks of what it reads from one, and plans."""
