"""What only a processor needs: C++ kernels, patched norms and gates, the arena."""
