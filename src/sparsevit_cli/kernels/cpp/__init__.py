"""The native engine: C++ for CPUs, what compiles it (`compiled`), and what calls it (`native`)."""
