// How a symbol leaves the library: everything is hidden but what carries this, and the version
// script agrees.
#pragma once

#define DORMOUSE_EXPORT __attribute__((visibility("default")))
