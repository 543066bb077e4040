// Python triggers: the rules python(module:qualname) and the presets that need more than rules. The
// Python half is python_rules.py and the presets' files. Gets in by itself when the library is
// loaded, and only where a rule asks for it.
#pragma once

namespace dormouse::shim::triggers {

// CUDA is in use. A Python that the program loaded after its start (an embedded one) begins to
// follow the rules now, at its main thread's next opportunity. Cheap; takes no lock of Python's.
void driver_initialised() noexcept;

}  // namespace dormouse::shim::triggers
