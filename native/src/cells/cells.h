// All that the patched KV cache needs of its intact cells, in one include.

#pragma once

#include "cells/arena.h"
#include "cells/graph.h"
#include "cells/pages.h"
#include "cells/sharing.h"
#include "cells/shift.h"
#include "cells/sight.h"
#include "cells/state.h"
#include "cells/tail.h"
