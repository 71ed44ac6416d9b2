"""Names the culprit of a damaged step: operator, line, sample; works on any module, without Lightning."""
