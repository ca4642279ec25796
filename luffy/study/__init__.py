"""The study: many runs at once, what came out of them, pictures, one group under the magnifying glass.
May import every room."""
