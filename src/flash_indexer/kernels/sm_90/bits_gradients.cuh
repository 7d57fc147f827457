#pragma once
#include "bits_words.cuh"
// dS / scale = a · (dP - delta); where a is zero neither NaN in delta, of a query with NaN scores, nor in dP has a part
static __device__ __forceinline__ float ds_of(float a, float dp, float delta) { return a == 0.f ? 0.f : a * (dp - delta); }
