// Runs a sketch for a few turns. SKETCH is its path, as a string.
#include "Arduino.h"

#include SKETCH

int main() {
  setup();
  for (int turn = 0; turn < 2; ++turn) {
    loop();
  }
  return 0;
}
