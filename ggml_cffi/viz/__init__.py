"""Reports, drawings and profiles of a scheduled graph."""
