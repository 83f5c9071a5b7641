"""What measures and landscapes share: coordinates of weight space, data sets, estimates."""
