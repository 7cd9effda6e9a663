#pragma once

// Visible outside the op library (everything else is hidden), for the introspection module beside it.
#define JET_EXPORT __attribute__((visibility("default")))
