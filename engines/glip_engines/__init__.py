"""Bundle to TensorRT engine. Nothing here yet: the builder, the plugin and the C++ runtime are the next stage."""
