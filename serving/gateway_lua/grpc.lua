-- What the gateway reads of an inference over gRPC before Triton does: the frame, and a ModelInferRequest's tensors.
local body = require("body")

-- Field numbers of inference.ModelInferRequest and of its InferInputTensor, from Triton's grpc_service.proto.
local REQUEST = { parameters = 4, inputs = 5, raw = 7 }
local INPUT = { name = 1, datatype = 2, shape = 3, parameters = 4, contents = 5 }
local MOST_FIELDS = 64
local FRAME = 5
local NOT_PROTOBUF = "message is not a ModelInferRequest"

local function refuse(source, message)
    source.close()
    ngx.header["Content-Type"] = "application/grpc"
    ngx.header["grpc-status"] = "3"
    ngx.header["grpc-message"] = ngx.escape_uri(message)
    return ngx.exit(204)
end

-- The number at a place and the place behind it; nil where there is none.
local function varint(source, place, stop)
    local value, factor = 0, 1
    for _, byte in ipairs({ source.read(place, math.min(10, stop - place)):byte(1, 10) }) do
        value = value + byte % 128 * factor
        factor = factor * 128
        place = place + 1
        if byte < 128 then
            return value, place
        end
    end
end

-- Calls each(field, number) or each(field, nil, offset, size) for the fields from place to stop. True when well formed
-- and not cut short by each returning false.
local function fields(source, place, stop, each)
    local count = 0
    while place < stop do
        local tag, number, size
        tag, place = varint(source, place, stop)
        count = count + 1
        if not tag or count > MOST_FIELDS then
            return false
        end
        local field, wire = math.floor(tag / 8), tag % 8
        if wire == 0 then
            number, place = varint(source, place, stop)
            if not number then
                return false
            end
            each(field, number)
        elseif wire == 2 then
            size, place = varint(source, place, stop)
            if not size or place + size > stop then
                return false
            end
            each(field, nil, place, size)
            place = place + size
        else
            return false
        end
    end
    return true
end

-- Name, datatype, shape of an input, and whether it brings parameters or typed contents; nil where it is not protobuf.
local function read_input(source, offset, size)
    local input = { name = "", datatype = "", shape = {} }
    local formed = fields(source, offset, offset + size, function(field, number, at, length)
        if (field == INPUT.name or field == INPUT.datatype) and at then
            input[field == INPUT.name and "name" or "datatype"] = source.read(at, math.min(length, body.LONGEST_NAME + 1))
        elseif field == INPUT.shape and number then
            table.insert(input.shape, number)
        elseif field == INPUT.shape then
            local place, stop = at, at + length
            -- One side too many is enough to be refused for it.
            while place and place < stop and #input.shape <= body.MOST_TENSORS do
                number, place = varint(source, place, stop)
                table.insert(input.shape, number or 0)
            end
        elseif field == INPUT.parameters then
            input.parameters = true
        elseif field == INPUT.contents then
            input.contents = true
        end
    end)
    return formed and input or nil
end

local function check_input(source, input, raw)
    if input.name == "" or #input.name > body.LONGEST_NAME then
        return "an input has no usable name"
    end
    local where = "input '" .. input.name .. "': "
    if input.contents then
        return where .. "contents is not accepted here; send raw_input_contents"
    end
    if input.parameters then
        return where .. "parameters are not accepted here"
    end
    local fault, elements = body.check_shape(input.shape)
    if not fault and not raw then
        fault = "has no entry in raw_input_contents"
    elseif not fault and input.datatype == "BYTES" then
        fault = body.check_strings(source, raw.offset, raw.size, elements)
    end
    return fault and where .. fault
end

local function check(source)
    local frame = { source.read(0, FRAME):byte(1, FRAME) }
    if #frame < FRAME or frame[1] ~= 0 then
        return "message is missing or compressed; send one plain message"
    end
    if FRAME + ((frame[2] * 256 + frame[3]) * 256 + frame[4]) * 256 + frame[5] ~= source.size then
        return "message is not as long as its frame says, or is not the only one"
    end
    local inputs, raws, parameters = {}, {}, false
    local formed = fields(source, FRAME, source.size, function(field, number, at, length)
        if field == REQUEST.inputs and at then
            table.insert(inputs, read_input(source, at, length) or { name = "", shape = {} })
        elseif field == REQUEST.raw and at then
            table.insert(raws, { offset = at, size = length })
        elseif field == REQUEST.parameters then
            parameters = true
        end
    end)
    if not formed then
        return NOT_PROTOBUF
    end
    if parameters then
        return "parameters of a request (timeout, priority) are not accepted here; set the deadline of the call instead"
    end
    if #inputs == 0 or #inputs > body.MOST_TENSORS then
        return "inputs are no list of 1 to " .. body.MOST_TENSORS .. " tensors"
    end
    for place, input in ipairs(inputs) do
        local fault = check_input(source, input, raws[place])
        if fault then
            return fault
        end
    end
    if #raws > #inputs then
        return "raw_input_contents has " .. #raws .. " entries for " .. #inputs .. " inputs"
    end
end

local source = body.open()
local fault = check(source)
if fault then
    return refuse(source, fault)
end
source.close()
