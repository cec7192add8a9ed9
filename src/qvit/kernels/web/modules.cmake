# The modules of WebAssembly, one for every set of vector instructions: the same sources but for wasm.cpp.
set(SIMD -mcpu=generic+simd128)
target_compile_options(qvit_kernels PUBLIC ${SIMD} -fno-exceptions -fno-rtti)
target_sources(qvit_kernels PRIVATE ${KERNELS}/web/thread_pool.cpp)
foreach(instructions simd128 relaxed-simd)
  add_executable(${instructions} ${KERNELS}/web/api.cpp ${KERNELS}/wasm.cpp)
  target_compile_options(${instructions} PRIVATE -O3 -Wall -Wextra -Wshadow -ffp-contract=off)
  target_link_libraries(${instructions} PRIVATE qvit_kernels)
  target_link_options(${instructions} PRIVATE ${SIMD} -mexec-model=reactor -Wl,--strip-all -Wl,-z,stack-size=1048576)
  set_target_properties(${instructions} PROPERTIES SUFFIX .wasm
                        RUNTIME_OUTPUT_DIRECTORY ${CMAKE_SOURCE_DIR}/src/qvit/web)
endforeach()
target_compile_options(relaxed-simd PRIVATE -mrelaxed-simd)
