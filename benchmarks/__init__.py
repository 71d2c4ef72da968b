"""Speed, memory and compile time beside peers; never part of the tests."""
