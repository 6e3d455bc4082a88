"""Models of other formats: export, and import of published weights."""
