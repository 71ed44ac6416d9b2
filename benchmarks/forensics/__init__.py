"""How often the culprit of NaN and Inf is right, on labelled failing steps."""
