"""Cache replacement policies. Nothing here knows of torch, files or devices: keys in, victims out."""
