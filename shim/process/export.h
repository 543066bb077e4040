// How a symbol leaves the library: everything is hidden but what carries this, and the version
// script agrees.
#pragma once

#define DORMOUSE_EXPORT __attribute__((visibility("default")))

// The library's version; a library that exports this is a copy of this one.
extern "C" DORMOUSE_EXPORT const char* dormouse_version(void);
