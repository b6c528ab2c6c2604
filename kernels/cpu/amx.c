/* Products of bfloat16 with AMX tiles. */
#include "native.h"
int amx_available(void){return 0;}
int amx_usable(const linear_args *a) { return (void)a, 0; }
int amx_linear(const linear_args *a) { return (void)a, -1; }
int amx_dx_usable(const linear_args *a) { return (void)a, 0; }
int amx_linear_dx(const linear_args *a) { return (void)a, -1; }
