"""Block inputs that wait in host memory between forward and backward."""
