"""Models in the files of other programs: Hugging Face, OLMo-core, llama.cpp. It knows no training."""
