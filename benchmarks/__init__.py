"""Speed, memory and compile time, compared with other implementations. Not part of the tests."""
