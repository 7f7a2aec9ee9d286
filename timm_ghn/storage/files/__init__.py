"""Files: where they lie, atomic writes, safetensors written and read as a stream."""
