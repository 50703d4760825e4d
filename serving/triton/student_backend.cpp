// `student` for the local server on a CPU: runs model.onnx with ONNX Runtime inside the server process.
//
// serving/compiled_backend.py compiles it: ORT_LIBRARY is the path of the installed libonnxruntime.so, ORT_VERSION its
// version. Inputs, outputs and error messages are those of student_model.py.

#include "student_backend_api.h"

#include <dlfcn.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

// How long ONNX Runtime's threads look for work before they sleep: longer than the gaps within a run. The default is
// about a second after each run, which takes the cores from everything else.
const char* const SPIN_MICROSECONDS = "500";
const char* const INPUTS[] = {"image", "strength"};
const char* const OUTPUTS[] = {"logits", "feature"};
using Names = std::vector<const char*>;  // of outputs, as pointers into OUTPUTS
using Shape = std::vector<int64_t>;

const OrtApi* ort = nullptr;
OrtEnv* environment = nullptr;
OrtMemoryInfo* cpu_memory = nullptr;

// A request cannot be answered because of what it holds.
struct Refused : std::runtime_error {
    using std::runtime_error::runtime_error;
};

void check(OrtStatus* status) {
    if (status == nullptr) return;
    std::string message = ort->GetErrorMessage(status);
    ort->ReleaseStatus(status);
    std::replace(message.begin(), message.end(), '\n', ' ');
    throw std::runtime_error(message);
}

void check(TRITONSERVER_Error* error) {
    if (error == nullptr) return;
    const std::string message = TRITONSERVER_ErrorMessage(error);
    TRITONSERVER_ErrorDelete(error);
    throw std::runtime_error(message);
}

// An object of ONNX Runtime, released at the end of its scope.
template <typename T>
struct Owned {
    T* value = nullptr;
    void (*release)(T*);
    explicit Owned(void (*release)(T*), T* value = nullptr) : value(value), release(release) {}
    Owned(Owned&& other) noexcept : value(other.value), release(other.release) { other.value = nullptr; }
    ~Owned() {
        if (value != nullptr) release(value);
    }
};

uint64_t now() {
    const auto time = std::chrono::steady_clock::now().time_since_epoch();
    return std::chrono::duration_cast<std::chrono::nanoseconds>(time).count();
}

bool finite(const float* values, size_t count) {
    return std::all_of(values, values + count, [](float value) { return std::isfinite(value); });
}

std::string text_of(const Shape& shape) {
    std::string text;
    for (int64_t side : shape) text += (text.empty() ? "" : ", ") + std::to_string(side);
    return text;
}

// A file's bytes. path_name: what an error message calls it.
std::vector<char> read_file(const std::string& path, const std::string& path_name) {
    std::ifstream stream(path, std::ios::binary | std::ios::ate);
    std::vector<char> bytes(stream ? static_cast<size_t>(stream.tellg()) : 0);
    if (!stream.seekg(0) || !stream.read(bytes.data(), bytes.size()))
        throw std::runtime_error(path_name + ": " + std::strerror(errno) + "; write the version again");
    return bytes;
}

// The JSON that follows a key and its colon; empty where the key is absent.
std::string after_key(const std::string& json, const std::string& key) {
    const size_t start = json.find("\"" + key + "\":");
    if (start == std::string::npos) return "";
    const size_t value = json.find_first_not_of(" \n", start + key.size() + 3);
    return value == std::string::npos ? "" : json.substr(value);
}

// The string at the beginning of a JSON text; empty where there is another value.
std::string json_string(const std::string& json) {
    return json.empty() || json[0] != '"' ? "" : json.substr(1, json.find('"', 1) - 1);
}

// model.onnx of a version. Throws where its sha256 is not the one in the manifest beside it.
std::vector<char> read_graph(const std::string& folder, const std::string& version) {
    const std::string name = "student/" + version + "/";
    const std::vector<char> manifest = read_file(folder + "/manifest.json", name + "manifest.json");
    const std::string expected = json_string(after_key({manifest.begin(), manifest.end()}, "student.onnx"));
    std::vector<char> graph = read_file(folder + "/model.onnx", name + "model.onnx");
    unsigned char digest[32];
    SHA256(reinterpret_cast<const unsigned char*>(graph.data()), graph.size(), digest);
    std::string found;
    for (unsigned char byte : digest) {
        found += "0123456789abcdef"[byte >> 4];
        found += "0123456789abcdef"[byte & 15];
    }
    if (found != expected)
        throw std::runtime_error(
            name + "model.onnx: sha256 is " + found.substr(0, 12) + "..., manifest.json says " + expected.substr(0, 12) +
            "...; write the version again");
    return graph;
}

// The number that JSON text begins with, in quotes or not; 0 where there is none.
int number(const std::string& json) { return std::atoi(json.c_str() + (json[0] == '"' ? 1 : 0)); }

// The model's config as JSON.
std::string config_of(TRITONBACKEND_Model* triton_model) {
    TRITONSERVER_Message* message = nullptr;
    const char* text = nullptr;
    size_t size = 0;
    check(TRITONBACKEND_ModelConfig(triton_model, 1, &message));
    check(TRITONSERVER_MessageSerializeToJson(message, &text, &size));
    const std::string config(text, size);
    TRITONSERVER_MessageDelete(message);
    return config;
}

// The cores that this process may use, which can be fewer than the machine has.
int available_cores() {
    cpu_set_t cores;
    return sched_getaffinity(0, sizeof cores, &cores) == 0 ? CPU_COUNT(&cores) : 1;
}

void create_session(const std::vector<char>& graph, int threads, Owned<OrtSession>& session) {
    Owned<OrtSessionOptions> options(ort->ReleaseSessionOptions);
    check(ort->CreateSessionOptions(&options.value));
    check(ort->SetIntraOpNumThreads(options.value, threads));
    check(ort->AddSessionConfigEntry(options.value, "session.intra_op.spin_duration_us", SPIN_MICROSECONDS));
    check(ort->CreateSessionFromArray(environment, graph.data(), graph.size(), options.value, &session.value));
}

// The rows of all usable requests of a batch.
struct Batch {
    std::vector<uint8_t> images;
    std::vector<float> strengths;
    Names outputs;  // that any of them requested
};

// An output of one run: its rows, one after another, of `width` numbers each.
struct Output {
    Owned<OrtValue> value;
    const float* numbers;
    size_t width;
};

// A loaded graph, shared by all instances of a version.
struct Model {
    explicit Model(TRITONBACKEND_Model* triton_model);
    std::vector<Output> run(Batch& batch);

    // A run on its own takes every core, so that a lone request is answered soonest. Beside another run each takes its
    // share: a small network loses a third of its throughput when two runs compete for the threads of one session.
    Owned<OrtSession> alone{ort->ReleaseSession}, shared{ort->ReleaseSession};
    std::atomic<int> running{0};
    Shape image_shape;       // of one row
    size_t image_bytes = 1;  // of one row
};

// The shape of one row of the graph's first input.
Shape row_shape(const OrtSession* session) {
    Owned<OrtTypeInfo> type(ort->ReleaseTypeInfo);
    const OrtTensorTypeAndShapeInfo* tensor = nullptr;
    size_t count = 0;
    check(ort->SessionGetInputTypeInfo(session, 0, &type.value));
    check(ort->CastTypeInfoToTensorInfo(type.value, &tensor));
    check(ort->GetDimensionsCount(tensor, &count));
    Shape shape(count);
    check(ort->GetDimensions(tensor, shape.data(), count));
    shape.erase(shape.begin());
    return shape;
}

Model::Model(TRITONBACKEND_Model* triton_model) {
    int artifact_type = 0;
    const char* location = nullptr;
    uint64_t version = 0;
    check(TRITONBACKEND_ModelRepository(triton_model, &artifact_type, &location));
    check(TRITONBACKEND_ModelVersion(triton_model, &version));
    const std::string name = std::to_string(version);
    const std::vector<char> graph = read_graph(std::string(location) + "/" + name, name);
    const std::string config = config_of(triton_model);
    const int threads = number(after_key(after_key(config, "intra_op_thread_count"), "string_value"));
    const int instances = number(after_key(after_key(config, "instance_group"), "count"));
    const int cores = available_cores();
    create_session(graph, threads > 0 ? threads : cores, alone);
    if (threads == 0 && instances > 1 && cores > 1) create_session(graph, std::max(1, cores / instances), shared);
    image_shape = row_shape(alone.value);
    for (int64_t side : image_shape) image_bytes *= side;
    // The first run lays a session's memory out; the second is one beside another.
    Batch empty{std::vector<uint8_t>(image_bytes), {0.0f}, {std::begin(OUTPUTS), std::end(OUTPUTS)}};
    for (running = 0; running < 2; ++running) run(empty);
    running = 0;
}

// The outputs of one run. Throws what ONNX Runtime reports.
std::vector<Output> Model::run(Batch& batch) {
    const int64_t rows = batch.strengths.size();
    Shape shape{rows};
    shape.insert(shape.end(), image_shape.begin(), image_shape.end());
    const Shape strength_shape{rows, 1};
    Owned<OrtValue> image(ort->ReleaseValue), strength(ort->ReleaseValue);
    check(ort->CreateTensorWithDataAsOrtValue(
        cpu_memory, batch.images.data(), batch.images.size(), shape.data(), shape.size(), TENSOR_UINT8, &image.value));
    check(ort->CreateTensorWithDataAsOrtValue(
        cpu_memory, batch.strengths.data(), rows * sizeof(float), strength_shape.data(), 2, TENSOR_FLOAT,
        &strength.value));
    const OrtValue* const inputs[] = {image.value, strength.value};
    std::vector<OrtValue*> values(batch.outputs.size(), nullptr);
    const bool others = running++ > 0;
    OrtSession* session = others && shared.value != nullptr ? shared.value : alone.value;
    OrtStatus* status = ort->Run(
        session, nullptr, INPUTS, inputs, 2, batch.outputs.data(), values.size(), values.data());
    running--;
    check(status);
    std::vector<Output> outputs;
    for (OrtValue* value : values) outputs.push_back({Owned<OrtValue>(ort->ReleaseValue, value), nullptr, 0});
    for (Output& output : outputs) {
        Owned<OrtTensorTypeAndShapeInfo> info(ort->ReleaseTensorTypeAndShapeInfo);
        void* data = nullptr;
        size_t count = 0;
        check(ort->GetTensorMutableData(output.value.value, &data));
        check(ort->GetTensorTypeAndShape(output.value.value, &info.value));
        check(ort->GetTensorShapeElementCount(info.value, &count));
        output.numbers = static_cast<const float*>(data);
        output.width = count / rows;
    }
    return outputs;
}

// One request of a batch. error: what it is answered with instead of outputs.
struct Job {
    TRITONBACKEND_Request* request = nullptr;
    TRITONBACKEND_Response* response = nullptr;
    TRITONSERVER_Error* error = nullptr;
    size_t first = 0, rows = 0;  // in the batch
    Names outputs;
};

// Calls a function for a request that has no error yet; what it throws becomes the request's error.
template <typename Function>
void try_for(Job& job, Function function) {
    if (job.error != nullptr) return;
    try {
        function();
    } catch (const Refused& refused) {
        job.error = TRITONSERVER_ErrorNew(ERROR_INVALID_ARG, refused.what());
    } catch (const std::exception& error) {
        job.error = TRITONSERVER_ErrorNew(ERROR_INTERNAL, error.what());
    }
}

// Appends the bytes of an input to `bytes`; its shape.
Shape read_input(TRITONBACKEND_Request* request, const char* name, std::vector<uint8_t>& bytes) {
    TRITONBACKEND_Input* input = nullptr;
    const int64_t* shape = nullptr;
    uint32_t dimensions = 0, buffers = 0;
    check(TRITONBACKEND_RequestInput(request, name, &input));
    check(TRITONBACKEND_InputProperties(input, nullptr, nullptr, &shape, &dimensions, nullptr, &buffers));
    for (uint32_t index = 0; index < buffers; ++index) {
        const void* buffer = nullptr;
        uint64_t size = 0;
        TRITONSERVER_MemoryType memory = MEMORY_CPU;
        int64_t memory_id = 0;
        check(TRITONBACKEND_InputBuffer(input, index, &buffer, &size, &memory, &memory_id));
        if (memory == MEMORY_GPU) throw Refused(std::string(name) + " is in GPU memory; expected host memory");
        const uint8_t* begin = static_cast<const uint8_t*>(buffer);
        bytes.insert(bytes.end(), begin, begin + size);
    }
    return {shape, shape + dimensions};
}

// Appends a request's rows and outputs to the batch. Throws Refused where its inputs cannot be used.
void read_request(const Model& model, Job& job, Batch& batch) {
    std::vector<uint8_t> images, strengths;
    const Shape image = read_input(job.request, INPUTS[0], images);
    const Shape strength = read_input(job.request, INPUTS[1], strengths);
    // Triton checks the shapes, but its product of huge sides overflows and lets some pass.
    const size_t rows = images.size() / model.image_bytes;
    Shape expected{static_cast<int64_t>(rows)};
    expected.insert(expected.end(), model.image_shape.begin(), model.image_shape.end());
    if (rows == 0 || image != expected || images.size() != rows * model.image_bytes ||
        strength != Shape{expected[0], 1} || strengths.size() != rows * sizeof(float))
        throw Refused(
            "image has shape [" + text_of(image) + "] and strength [" + text_of(strength) + "]; expected [n, " +
            text_of(model.image_shape) + "] and [n, 1]");
    std::vector<float> values(rows);
    std::memcpy(values.data(), strengths.data(), strengths.size());
    if (!finite(values.data(), rows))
        throw Refused("strength holds a number that is not finite; expected finite numbers");
    uint32_t count = 0;
    check(TRITONBACKEND_RequestOutputCount(job.request, &count));
    for (uint32_t index = 0; index < count; ++index) {
        const char* name = nullptr;
        check(TRITONBACKEND_RequestOutputName(job.request, index, &name));
        for (const char* known : OUTPUTS)
            if (std::strcmp(known, name) == 0) job.outputs.push_back(known);
    }
    for (const char* name : job.outputs)
        if (std::count(batch.outputs.begin(), batch.outputs.end(), name) == 0) batch.outputs.push_back(name);
    job.first = batch.strengths.size();
    job.rows = rows;
    batch.images.insert(batch.images.end(), images.begin(), images.end());
    batch.strengths.insert(batch.strengths.end(), values.begin(), values.end());
}

// Puts a request's rows of its outputs into its response. Throws Refused where one is not finite.
void write_response(const Job& job, const Names& names, const std::vector<Output>& outputs) {
    for (const char* name : job.outputs) {
        const Output& output = outputs[std::find(names.begin(), names.end(), name) - names.begin()];
        const float* numbers = output.numbers + job.first * output.width;
        if (!finite(numbers, job.rows * output.width))
            throw Refused(
                "the answer holds a number that is not finite; expected a smaller strength, or an image that has one");
        const int64_t shape[] = {static_cast<int64_t>(job.rows), static_cast<int64_t>(output.width)};
        const size_t bytes = job.rows * output.width * sizeof(float);
        TRITONBACKEND_Output* written = nullptr;
        void* buffer = nullptr;
        TRITONSERVER_MemoryType memory = MEMORY_CPU;
        int64_t memory_id = 0;
        check(TRITONBACKEND_ResponseOutput(job.response, &written, name, TYPE_FP32, shape, 2));
        check(TRITONBACKEND_OutputBuffer(written, &buffer, bytes, &memory, &memory_id));
        if (memory == MEMORY_GPU) throw Refused(std::string(name) + " is requested in GPU memory; expected host memory");
        std::memcpy(buffer, numbers, bytes);
    }
}

// Answers all requests of a batch from one run; a request that cannot be answered fails alone.
void execute(Model& model, TRITONBACKEND_ModelInstance* instance, std::vector<Job>& jobs) {
    const uint64_t begin = now();
    Batch batch;
    for (Job& job : jobs) {
        try_for(job, [&] {
            check(TRITONBACKEND_ResponseNew(&job.response, job.request));
            read_request(model, job, batch);
        });
    }
    const uint64_t compute_begin = now();
    std::vector<Output> outputs;
    if (!batch.strengths.empty()) {
        try {
            outputs = model.run(batch);
        } catch (const std::exception& error) {
            for (Job& job : jobs) try_for(job, [&] { throw std::runtime_error(error.what()); });
        }
    }
    const uint64_t compute_end = now();
    for (Job& job : jobs) try_for(job, [&] { write_response(job, batch.outputs, outputs); });
    const uint64_t end = now();
    for (Job& job : jobs) {
        const bool success = job.error == nullptr;
        if (job.response != nullptr) TRITONBACKEND_ResponseSend(job.response, RESPONSE_COMPLETE_FINAL, job.error);
        if (!success) TRITONSERVER_ErrorDelete(job.error);
        TRITONBACKEND_ModelInstanceReportStatistics(
            instance, job.request, success, begin, compute_begin, compute_end, end);
        TRITONBACKEND_RequestRelease(job.request, REQUEST_RELEASE_ALL);
    }
    if (!outputs.empty())
        TRITONBACKEND_ModelInstanceReportBatchStatistics(
            instance, batch.strengths.size(), begin, compute_begin, compute_end, end);
}

void load_onnxruntime() {
    uint32_t major = 0, minor = 0;
    check(TRITONBACKEND_ApiVersion(&major, &minor));
    if (major != API_VERSION_MAJOR)
        throw std::runtime_error("Triton's backend API has version " + std::to_string(major) + "; expected 1");
    void* library = dlopen(ORT_LIBRARY, RTLD_NOW | RTLD_LOCAL);
    const auto base = library ? reinterpret_cast<const OrtApiBase* (*)()>(dlsym(library, "OrtGetApiBase")) : nullptr;
    if (base == nullptr) throw std::runtime_error(dlerror());
    const std::string version = base()->GetVersionString();
    if (version != ORT_VERSION)
        throw std::runtime_error(ORT_LIBRARY ": version is " + version + "; expected " ORT_VERSION);
    ort = base()->GetApi(ORT_API_VERSION);
    check(ort->CreateEnv(ORT_LOGGING_LEVEL_WARNING, "student", &environment));
    check(ort->CreateCpuMemoryInfo(ARENA_ALLOCATOR, MEM_TYPE_DEFAULT, &cpu_memory));
}

Model* model_of(TRITONBACKEND_Model* triton_model) {
    void* state = nullptr;
    check(TRITONBACKEND_ModelState(triton_model, &state));
    return static_cast<Model*>(state);
}

// Calls a function for Triton, which takes errors and no exceptions.
template <typename Function>
TRITONSERVER_Error* guarded(Function function) {
    try {
        function();
        return nullptr;
    } catch (const std::exception& error) {
        return TRITONSERVER_ErrorNew(ERROR_INTERNAL, error.what());
    }
}

}  // namespace

#define EXPORTED extern "C" __attribute__((visibility("default"))) TRITONSERVER_Error*

EXPORTED TRITONBACKEND_Initialize(TRITONBACKEND_Backend*) { return guarded(load_onnxruntime); }

EXPORTED TRITONBACKEND_ModelInitialize(TRITONBACKEND_Model* triton_model) {
    return guarded([&] {
        auto model = std::make_unique<Model>(triton_model);
        check(TRITONBACKEND_ModelSetState(triton_model, model.get()));
        model.release();
    });
}

EXPORTED TRITONBACKEND_ModelFinalize(TRITONBACKEND_Model* triton_model) {
    return guarded([&] { delete model_of(triton_model); });
}

EXPORTED TRITONBACKEND_ModelInstanceExecute(
    TRITONBACKEND_ModelInstance* instance, TRITONBACKEND_Request** requests, const uint32_t count) {
    return guarded([&] {
        TRITONBACKEND_Model* triton_model = nullptr;
        check(TRITONBACKEND_ModelInstanceModel(instance, &triton_model));
        Model* model = model_of(triton_model);
        std::vector<Job> jobs(count);
        for (uint32_t index = 0; index < count; ++index) jobs[index].request = requests[index];
        execute(*model, instance, jobs);
    });
}
