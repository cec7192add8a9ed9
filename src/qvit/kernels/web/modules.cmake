# The modules of WebAssembly: for every set of vector instructions one with a thread and one with several.
set(PAGES 64)  # of 64 KiB, that a memory begins with; engine.js says it too
set(MOST_PAGES 32768)
math(EXPR LEAST_BYTES "${PAGES} * 65536")
math(EXPR MOST_BYTES "${MOST_PAGES} * 65536")
set(ONE_THREAD -mcpu=generic+simd128)
set(THREADS -mcpu=generic+simd128+atomics+bulk_memory)

set(OPTIONS -O3 -Wall -Wextra -Wshadow -ffp-contract=off -fno-exceptions -fno-rtti)

target_compile_options(qvit_kernels PUBLIC ${ONE_THREAD} ${OPTIONS})
get_target_property(SOURCES qvit_kernels SOURCES)
add_library(qvit_kernels-threads OBJECT ${SOURCES} ${KERNELS}/web/thread_pool.cpp)
target_include_directories(qvit_kernels-threads PUBLIC ${KERNELS})
target_compile_options(qvit_kernels-threads PUBLIC ${THREADS} ${OPTIONS})

function(add_module name instructions kernels features)
  add_executable(${name} ${ARGN} ${KERNELS}/wasm.cpp)
  target_link_libraries(${name} PRIVATE ${kernels})
  target_link_options(${name} PRIVATE ${features} -Wl,--strip-all)
  if(instructions STREQUAL "relaxed-simd")
    target_compile_options(${name} PRIVATE -mrelaxed-simd)
  endif()
  set_target_properties(${name} PROPERTIES SUFFIX .wasm)
endfunction()

foreach(instructions simd128 relaxed-simd)
  add_module(${instructions} ${instructions} qvit_kernels "${ONE_THREAD}" ${KERNELS}/web/api.cpp)
  add_module(${instructions}-threads ${instructions} qvit_kernels-threads "${THREADS}" ${KERNELS}/web/api.cpp)
  target_link_options(${instructions}-threads PRIVATE
                      -Wl,--shared-memory,--max-memory=${MOST_BYTES},--export=__stack_pointer
                      -Wl,--export=__wasm_init_tls,--export=__tls_size,--export=__tls_align)
  foreach(module ${instructions} ${instructions}-threads)
    target_link_options(${module} PRIVATE -mexec-model=reactor -Wl,-z,stack-size=1048576
                        -Wl,--import-memory,--initial-memory=${LEAST_BYTES})
    set_target_properties(${module} PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${CMAKE_SOURCE_DIR}/src/qvit/web)
  endforeach()
  # Of the same vectors a program for WASI, for tests.
  add_module(kernels_test-${instructions} ${instructions} qvit_kernels "${ONE_THREAD}" tests/kernels/kernels_test.cpp)
endforeach()
