// In the order of mixlora/ops/shared_glu.py.
#pragma once

namespace mixlora {

enum class Activation { kSilu, kGelu, kGeluTanh, kRelu };

}  // namespace mixlora
