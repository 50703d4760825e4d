// The declarations of two C APIs that student_backend.cpp uses: Triton's backend API and ONNX Runtime's.
#pragma once

#include <cstddef>
#include <cstdint>

// Triton's backend API (tritonbackend.h and tritonserver.h of release 24.10), which the server exports.
struct TRITONSERVER_Error;
struct TRITONSERVER_Message;
struct TRITONBACKEND_Backend;
struct TRITONBACKEND_Model;
struct TRITONBACKEND_ModelInstance;
struct TRITONBACKEND_Request;
struct TRITONBACKEND_Response;
struct TRITONBACKEND_Input;
struct TRITONBACKEND_Output;
enum TRITONSERVER_Error_Code { ERROR_INTERNAL = 1, ERROR_INVALID_ARG = 3 };
enum TRITONSERVER_DataType { TYPE_FP32 = 11 };
enum TRITONSERVER_MemoryType { MEMORY_CPU, MEMORY_CPU_PINNED, MEMORY_GPU };
constexpr uint32_t RESPONSE_COMPLETE_FINAL = 1, REQUEST_RELEASE_ALL = 1, API_VERSION_MAJOR = 1;

extern "C" {
TRITONSERVER_Error* TRITONSERVER_ErrorNew(TRITONSERVER_Error_Code, const char* message);
const char* TRITONSERVER_ErrorMessage(TRITONSERVER_Error*);
void TRITONSERVER_ErrorDelete(TRITONSERVER_Error*);
TRITONSERVER_Error* TRITONSERVER_MessageSerializeToJson(TRITONSERVER_Message*, const char** base, size_t* size);
TRITONSERVER_Error* TRITONSERVER_MessageDelete(TRITONSERVER_Message*);
TRITONSERVER_Error* TRITONBACKEND_ApiVersion(uint32_t* major, uint32_t* minor);
TRITONSERVER_Error* TRITONBACKEND_ModelConfig(TRITONBACKEND_Model*, uint32_t version, TRITONSERVER_Message**);
TRITONSERVER_Error* TRITONBACKEND_ModelRepository(TRITONBACKEND_Model*, int* artifact_type, const char** location);
TRITONSERVER_Error* TRITONBACKEND_ModelVersion(TRITONBACKEND_Model*, uint64_t* version);
TRITONSERVER_Error* TRITONBACKEND_ModelState(TRITONBACKEND_Model*, void** state);
TRITONSERVER_Error* TRITONBACKEND_ModelSetState(TRITONBACKEND_Model*, void* state);
TRITONSERVER_Error* TRITONBACKEND_ModelInstanceModel(TRITONBACKEND_ModelInstance*, TRITONBACKEND_Model**);
TRITONSERVER_Error* TRITONBACKEND_ModelInstanceReportStatistics(
    TRITONBACKEND_ModelInstance*, TRITONBACKEND_Request*, bool success, uint64_t begin, uint64_t compute_begin,
    uint64_t compute_end, uint64_t end);
TRITONSERVER_Error* TRITONBACKEND_ModelInstanceReportBatchStatistics(
    TRITONBACKEND_ModelInstance*, uint64_t rows, uint64_t begin, uint64_t compute_begin, uint64_t compute_end,
    uint64_t end);
TRITONSERVER_Error* TRITONBACKEND_RequestInput(TRITONBACKEND_Request*, const char* name, TRITONBACKEND_Input**);
TRITONSERVER_Error* TRITONBACKEND_RequestOutputCount(TRITONBACKEND_Request*, uint32_t* count);
TRITONSERVER_Error* TRITONBACKEND_RequestOutputName(TRITONBACKEND_Request*, uint32_t index, const char** name);
TRITONSERVER_Error* TRITONBACKEND_RequestRelease(TRITONBACKEND_Request*, uint32_t flags);
TRITONSERVER_Error* TRITONBACKEND_InputProperties(
    TRITONBACKEND_Input*, const char** name, TRITONSERVER_DataType*, const int64_t** shape, uint32_t* dimensions,
    uint64_t* bytes, uint32_t* buffers);
TRITONSERVER_Error* TRITONBACKEND_InputBuffer(
    TRITONBACKEND_Input*, uint32_t index, const void** buffer, uint64_t* bytes, TRITONSERVER_MemoryType*,
    int64_t* memory_id);
TRITONSERVER_Error* TRITONBACKEND_ResponseNew(TRITONBACKEND_Response**, TRITONBACKEND_Request*);
TRITONSERVER_Error* TRITONBACKEND_ResponseOutput(
    TRITONBACKEND_Response*, TRITONBACKEND_Output**, const char* name, TRITONSERVER_DataType, const int64_t* shape,
    uint32_t dimensions);
TRITONSERVER_Error* TRITONBACKEND_OutputBuffer(
    TRITONBACKEND_Output*, void** buffer, uint64_t bytes, TRITONSERVER_MemoryType*, int64_t* memory_id);
TRITONSERVER_Error* TRITONBACKEND_ResponseSend(TRITONBACKEND_Response*, uint32_t flags, TRITONSERVER_Error*);
// Of the libcrypto that the server is linked with.
unsigned char* SHA256(const unsigned char* data, size_t size, unsigned char* digest);
}

// ONNX Runtime's C API (onnxruntime_c_api.h). The position of a function in the table never changes once released.
struct OrtStatus;
struct OrtEnv;
struct OrtSession;
struct OrtSessionOptions;
struct OrtRunOptions;
struct OrtValue;
struct OrtTypeInfo;
struct OrtMemoryInfo;
struct OrtTensorTypeAndShapeInfo;
enum { ORT_LOGGING_LEVEL_WARNING = 2, TENSOR_FLOAT = 1, TENSOR_UINT8 = 2, ARENA_ALLOCATOR = 1, MEM_TYPE_DEFAULT = 0 };
constexpr uint32_t ORT_API_VERSION = 5;  // the first that has every function below
struct OrtApi {
    void* to_1[2];
    const char* (*GetErrorMessage)(const OrtStatus*);
    OrtStatus* (*CreateEnv)(int level, const char* log_id, OrtEnv**);
    void* to_7[4];
    OrtStatus* (*CreateSessionFromArray)(
        const OrtEnv*, const void* model, size_t size, const OrtSessionOptions*, OrtSession**);
    OrtStatus* (*Run)(
        OrtSession*, const OrtRunOptions*, const char* const* input_names, const OrtValue* const* inputs,
        size_t input_count, const char* const* output_names, size_t output_count, OrtValue** outputs);
    OrtStatus* (*CreateSessionOptions)(OrtSessionOptions**);
    void* to_23[13];
    OrtStatus* (*SetIntraOpNumThreads)(OrtSessionOptions*, int threads);
    void* to_32[8];
    OrtStatus* (*SessionGetInputTypeInfo)(const OrtSession*, size_t index, OrtTypeInfo**);
    void* to_48[15];
    OrtStatus* (*CreateTensorWithDataAsOrtValue)(
        const OrtMemoryInfo*, void* data, size_t bytes, const int64_t* shape, size_t dimensions, int type, OrtValue**);
    void* to_50;
    OrtStatus* (*GetTensorMutableData)(OrtValue*, void** data);
    void* to_54[3];
    OrtStatus* (*CastTypeInfoToTensorInfo)(const OrtTypeInfo*, const OrtTensorTypeAndShapeInfo**);
    void* to_60[5];
    OrtStatus* (*GetDimensionsCount)(const OrtTensorTypeAndShapeInfo*, size_t* count);
    OrtStatus* (*GetDimensions)(const OrtTensorTypeAndShapeInfo*, int64_t* dimensions, size_t count);
    void* to_63;
    OrtStatus* (*GetTensorShapeElementCount)(const OrtTensorTypeAndShapeInfo*, size_t* count);
    OrtStatus* (*GetTensorTypeAndShape)(const OrtValue*, OrtTensorTypeAndShapeInfo**);
    void* to_68[3];
    OrtStatus* (*CreateCpuMemoryInfo)(int allocator_type, int memory_type, OrtMemoryInfo**);
    void* to_92[23];
    void (*ReleaseStatus)(OrtStatus*);
    void (*ReleaseMemoryInfo)(OrtMemoryInfo*);
    void (*ReleaseSession)(OrtSession*);
    void (*ReleaseValue)(OrtValue*);
    void* to_97;
    void (*ReleaseTypeInfo)(OrtTypeInfo*);
    void (*ReleaseTensorTypeAndShapeInfo)(OrtTensorTypeAndShapeInfo*);
    void (*ReleaseSessionOptions)(OrtSessionOptions*);
    void* to_129[29];
    OrtStatus* (*AddSessionConfigEntry)(OrtSessionOptions*, const char* key, const char* value);
};
static_assert(offsetof(OrtApi, Run) == 9 * sizeof(void*) && offsetof(OrtApi, SetIntraOpNumThreads) == 24 * sizeof(void*));
static_assert(offsetof(OrtApi, SessionGetInputTypeInfo) == 33 * sizeof(void*));
static_assert(offsetof(OrtApi, CreateTensorWithDataAsOrtValue) == 49 * sizeof(void*));
static_assert(offsetof(OrtApi, CastTypeInfoToTensorInfo) == 55 * sizeof(void*));
static_assert(offsetof(OrtApi, GetDimensionsCount) == 61 * sizeof(void*));
static_assert(offsetof(OrtApi, GetTensorTypeAndShape) == 65 * sizeof(void*));
static_assert(offsetof(OrtApi, CreateCpuMemoryInfo) == 69 * sizeof(void*));
static_assert(offsetof(OrtApi, ReleaseStatus) == 93 * sizeof(void*));
static_assert(offsetof(OrtApi, ReleaseSessionOptions) == 100 * sizeof(void*));
static_assert(offsetof(OrtApi, AddSessionConfigEntry) == 130 * sizeof(void*));
struct OrtApiBase {
    const OrtApi* (*GetApi)(uint32_t version);
    const char* (*GetVersionString)();
};
