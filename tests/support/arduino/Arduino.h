// As much of Arduino's core as examples/arduino needs, on POSIX, so that a sketch can be compiled and run in a test.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <unistd.h>

typedef uint8_t byte;

inline unsigned long millis() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (unsigned long)(now.tv_sec * 1000 + now.tv_nsec / 1000000);
}

inline void delay(unsigned long ms) { usleep((useconds_t)ms * 1000); }

inline long random(long end) {
  unsigned int value = 0;
  FILE *source = fopen("/dev/urandom", "rb");
  if (source == nullptr || fread(&value, sizeof value, 1, source) != 1) {
    abort();
  }
  fclose(source);
  return (long)(value % (unsigned long)end);
}

// The pins read 0, 1365, 2730 …, of 4095.
inline int analogRead(int pin) { return pin * 1365; }

struct SerialPort {
  void begin(long) {}
  void print(const char *text) { fputs(text, stdout); }
  void println(const char *text = "") {
    puts(text);
    fflush(stdout);
  }
  void write(const byte *data, size_t length) { fwrite(data, 1, length, stdout); }
};
inline SerialPort Serial;
