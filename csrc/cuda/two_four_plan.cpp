// How products with a 2:4 weight are done on a GPU: the choices in one table, made without one.
#include "kernels.h"

namespace bitmask::cuda {

TwoFourPlan plan_two_four(const TwoFourParams&, const Device&) { return {TwoFourWay::kLibrary, 0}; }

}  // namespace bitmask::cuda
