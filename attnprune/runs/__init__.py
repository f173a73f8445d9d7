"""A run's settings and its folder, read before anything heavy is imported. No torch."""
