// The words that Metal adds to C++. Included last: from here on the text is Metal.
#pragma once

#define METAL_FUNC static inline
#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")

#define float2(...) metal_cpu::vector<float2>(__VA_ARGS__)
#define float3(...) metal_cpu::vector<float3>(__VA_ARGS__)
#define float4(...) metal_cpu::vector<float4>(__VA_ARGS__)
#define half2(...) metal_cpu::vector<half2>(__VA_ARGS__)
#define half3(...) metal_cpu::vector<half3>(__VA_ARGS__)
#define half4(...) metal_cpu::vector<half4>(__VA_ARGS__)
#define bfloat2(...) metal_cpu::vector<bfloat2>(__VA_ARGS__)
#define bfloat3(...) metal_cpu::vector<bfloat3>(__VA_ARGS__)
#define bfloat4(...) metal_cpu::vector<bfloat4>(__VA_ARGS__)
#define int2(...) metal_cpu::vector<int2>(__VA_ARGS__)
#define int3(...) metal_cpu::vector<int3>(__VA_ARGS__)
#define int4(...) metal_cpu::vector<int4>(__VA_ARGS__)
#define uint2(...) metal_cpu::vector<uint2>(__VA_ARGS__)
#define uint3(...) metal_cpu::vector<uint3>(__VA_ARGS__)
#define uint4(...) metal_cpu::vector<uint4>(__VA_ARGS__)
#define short2(...) metal_cpu::vector<short2>(__VA_ARGS__)
#define short4(...) metal_cpu::vector<short4>(__VA_ARGS__)
#define ushort2(...) metal_cpu::vector<ushort2>(__VA_ARGS__)
#define ushort4(...) metal_cpu::vector<ushort4>(__VA_ARGS__)
#define uchar2(...) metal_cpu::vector<uchar2>(__VA_ARGS__)
#define uchar4(...) metal_cpu::vector<uchar4>(__VA_ARGS__)
#define ulong2(...) metal_cpu::vector<ulong2>(__VA_ARGS__)

// what C++ has and Metal has not
#define double Metal_has_no_double
#define goto Metal_has_no_goto
#define throw Metal_has_no_exceptions
#define try Metal_has_no_exceptions
#define new Metal_has_no_new
#define delete Metal_has_no_delete
#define virtual Metal_has_no_virtual
#define dynamic_cast Metal_has_no_dynamic_cast
#define asm Metal_has_no_asm
